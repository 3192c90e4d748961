"""Whether this tree still computes and queues what an earlier commit did: both run side by side on one machine.

Only the command line and the files of a run folder are used, so that the insides may be rewritten in between.
"""
