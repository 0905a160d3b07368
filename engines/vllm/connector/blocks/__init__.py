"""vLLM's KV memory as bytes of blocks: where a block's bytes lie, and how jobs read and write them, on a CPU or a GPU.

Owns the staging memory and the copy streams of a GPU. Which block holds what is the orders' business.
"""
