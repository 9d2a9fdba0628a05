"""The FlowNetwork family: configuration, models, routing, memory and the API of the FlowNetwork paper."""
