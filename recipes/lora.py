"""Train a LoRA adapter that classifies user behaviour.

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/lora.py \
    --config recipes/configs/movies/lora.yaml --data.path DIR --output_dir OUT
"""

from llmrec_peft.config.schema import LoraConfig, exit_on_error, parse_config


def main(args: list[str] | None = None) -> None:
    config = parse_config(LoraConfig, args)
    with exit_on_error():
        from llmrec_peft.recipes.train import train

        train(config)


if __name__ == "__main__":
    main()
