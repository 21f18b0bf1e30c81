"""Demo: the whole loop on one machine, with a speculator that starts untrained."""
