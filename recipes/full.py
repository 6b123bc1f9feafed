"""Train every weight of the base and the head.

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/full.py \
    --config recipes/configs/movies/full.yaml --data.path DIR --output_dir OUT
"""

from llmrec_peft.config.schema import FullConfig, exit_on_error, parse_config


def main(args: list[str] | None = None) -> None:
    config = parse_config(FullConfig, args)
    with exit_on_error():
        from llmrec_peft.recipes.train import train

        train(config)


if __name__ == "__main__":
    main()
