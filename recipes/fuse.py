"""Fit what a log says of its items beside a bundle's answers, measure both together, and keep them for recommending.

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/fuse.py \
    --bundle OUT/bundle --data.path DIR --valid_targets 5000
"""

from llmrec_peft.config import FuseConfig, exit_on_error, parse_config


def main(args: list[str] | None = None) -> None:
    config = parse_config(FuseConfig, args)
    with exit_on_error():
        from llmrec_peft.pipeline import fuse

        fuse(config)


if __name__ == "__main__":
    main()
