"""The embedded corpus of public-domain English. See README.md beside this file for its provenance."""
