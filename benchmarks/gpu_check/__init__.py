"""What only a GPU can show: `make gpu-check`. One file a group of checks; each result is written down at once.
Of this folder, `__main__`, `pack`, `carried` and `results` need the standard library alone: a bare machine starts them.
"""
