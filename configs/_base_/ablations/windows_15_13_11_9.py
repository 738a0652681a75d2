# Windows that are larger on finer streams. The configs take `backbone` out by `_base_.pop`.
backbone = dict(window_size=(15, 13, 11, 9))
