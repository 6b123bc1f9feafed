"""Train a LoRA adapter on a base held in 4 bits.

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/qlora.py \
    --config recipes/configs/movies/qlora.yaml --data.path DIR --output_dir OUT
"""

from llmrec_peft.config.schema import QloraConfig, exit_on_error, parse_config


def main(args: list[str] | None = None) -> None:
    config = parse_config(QloraConfig, args)
    with exit_on_error():
        from llmrec_peft.recipes.train import train

        train(config)


if __name__ == "__main__":
    main()
