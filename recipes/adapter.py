"""Train bottleneck adapters, after or beside the layers' blocks.

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/adapter.py \
    --config recipes/configs/movies/adapter.yaml --data.path DIR --output_dir OUT
"""

from llmrec_peft.config.schema import AdapterConfig, exit_on_error, parse_config


def main(args: list[str] | None = None) -> None:
    config = parse_config(AdapterConfig, args)
    with exit_on_error():
        from llmrec_peft.recipes.train import train

        train(config)


if __name__ == "__main__":
    main()
