"""Distil a trained teacher into a small student.

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/distill.py \
    --config recipes/configs/movies/distill.yaml --teacher OUT/bundle --data.path DIR --output_dir OUT
"""

from llmrec_peft.config.schema import DistillConfig, exit_on_error, parse_config


def main(args: list[str] | None = None) -> None:
    config = parse_config(DistillConfig, args)
    with exit_on_error():
        from llmrec_peft.recipes.distill import distill

        distill(config)


if __name__ == "__main__":
    main()
