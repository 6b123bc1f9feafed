"""Fit what a log says of its items beside a bundle's answers, measure both together, and keep them for recommending.

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/index.py \
    --bundle OUT/bundle --data.path DIR --valid_targets 5000
"""

from llmrec_peft.config.schema import IndexConfig, exit_on_error, parse_config


def main(args: list[str] | None = None) -> None:
    config = parse_config(IndexConfig, args)
    with exit_on_error():
        from llmrec_peft.recipes.index import index

        index(config)


if __name__ == "__main__":
    main()
