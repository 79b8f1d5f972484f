"""What every test needs before torch is loaded."""

import os

# On processors without AVX512 the last bit of MKL's products follows where in memory its inputs lie, so a model that is
# read again differs from the one in memory. Tests that compare bit for bit want the same sum either way.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
