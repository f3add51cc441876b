"""The layouts that pictures and captions come in: files with lists or sidecars, hub data sets, tar shards."""
