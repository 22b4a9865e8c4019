"""The nouns and the mathematics: no disk, no network layer, no training loop, no plot."""
