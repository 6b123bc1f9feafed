"""Train the classification head alone: the cheapest method, and the measure of the others.

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/head.py \
    --config recipes/configs/movies/head.yaml --data.path DIR --output_dir OUT
"""

from llmrec_peft.config.schema import HeadConfig, exit_on_error, parse_config


def main(args: list[str] | None = None) -> None:
    config = parse_config(HeadConfig, args)
    with exit_on_error():
        from llmrec_peft.recipes.train import train

        train(config)


if __name__ == "__main__":
    main()
