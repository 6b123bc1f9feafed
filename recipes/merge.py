"""Merge a bundle into a stock sequence classifier that Transformers loads alone, and measure that it answers the same.

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/merge.py \
    --bundle OUT/bundle --data.path DIR --output_dir out/merged
"""

from llmrec_peft.config.schema import MergeConfig, exit_on_error, parse_config


def main(args: list[str] | None = None) -> None:
    config = parse_config(MergeConfig, args)
    with exit_on_error():
        from llmrec_peft.recipes.merge import merge

        merge(config)


if __name__ == "__main__":
    main()
