"""Status, top, lineage and doctor: what runs, how far it has come, and what is set up wrong."""
