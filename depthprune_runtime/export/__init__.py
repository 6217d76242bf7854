"""Ways out: a model of ours in the formats that other runtimes read, one file a target."""
