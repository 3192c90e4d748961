"""`interruptible` for the training: see ftlib.interruptible."""

from ftlib.interruptible import interruptible as interruptible
