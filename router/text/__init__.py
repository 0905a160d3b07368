"""Text to tokens and back: tokenizer, chat template, detokenizing, stop strings.

Owns every decision about text. Knows no request and no node.
"""
