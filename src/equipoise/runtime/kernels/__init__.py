"""Products of slots: oneDNN's prepacked GEMMs (AMX, VNNI), vector instructions on plain weights, grouped on a GPU."""
