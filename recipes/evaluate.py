"""Score a trained bundle again, by streams or by one independent prompt a target.

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/evaluate.py \
    --bundle OUT/bundle --data.path DIR --mode stream
"""

from llmrec_peft.config.schema import EvaluateConfig, exit_on_error, parse_config


def main(args: list[str] | None = None) -> None:
    config = parse_config(EvaluateConfig, args)
    with exit_on_error():
        from llmrec_peft.recipes.evaluate import evaluate

        evaluate(config)


if __name__ == "__main__":
    main()
