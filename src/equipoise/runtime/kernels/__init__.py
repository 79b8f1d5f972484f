"""Fast products of slots on CPU: oneDNN's prepacked bf16 and int8 GEMMs (AMX or VNNI), and compiled row kernels."""
