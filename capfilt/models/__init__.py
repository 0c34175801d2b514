"""Networks and what surrounds them; torch."""

import os

# Before torch takes its first memory: blocks of 2 MB and more in large pages, where the system gives them to who asks.
# In pages of 4 KiB a processor keeps looking up where they are, in a virtual machine twice.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
