# An HRFormer small enough to learn on a CPU within minutes: the tiny architecture has 2.6 million
# parameters, this one 0.5.
arch = dict(channels=(16, 32, 48, 64), num_heads=(1, 2, 3, 4), num_modules=(1, 1, 1), num_blocks=1)
