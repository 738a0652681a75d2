"""Train a config of any of the three tasks, by the stock train.py of the config's framework."""

import sys

from mmhrformer.cli.launch import run_stock_tool

if __name__ == '__main__':
    run_stock_tool('train', sys.argv[1:])
