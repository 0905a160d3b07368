"""The OpenAI API in front of the cluster: text to tokens and back, routing policies, the life of each request.

Owns every retry and every text. Holds no state that cannot be rebuilt. Never imports transfer, torch or vllm.
"""
