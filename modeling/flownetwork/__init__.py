"""FlowNetwork."""
