"""Model code. `ops` and `modules` are shared; each family has a folder; `hub_code` writes what travels to the Hub."""
