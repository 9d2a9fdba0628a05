"""Pictures of models, texts, fields and training runs."""
