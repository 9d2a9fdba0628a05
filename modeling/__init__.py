"""Model code: `ops` and `modules` are shared, each family has a folder, `hub_code` writes the code of saved models."""
