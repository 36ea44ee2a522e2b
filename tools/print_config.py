"""Print a config as a run would see it, with --norm and --cfg-options applied."""

import argparse

from _common import add_config_args, read_config, run


def main() -> None:
    """Print the config."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_args(parser)
    parser.add_argument("--save", help="also write it to this file (.py)")
    args = parser.parse_args()
    cfg = read_config(args)
    print(cfg.pretty_text)
    if args.save:
        cfg.dump(args.save)


if __name__ == "__main__":
    run(main)
