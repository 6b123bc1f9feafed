"""Rank items for many users by a trained bundle: a file of users in, each user's best items with probabilities out.

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/recommend.py \
    --bundle out/movies/bundle --data.path DIR --users out/users.parquet --k 10 --output_dir out/recommended
"""

from llmrec_peft.config.schema import RecommendConfig, exit_on_error, parse_config


def main(args: list[str] | None = None) -> None:
    config = parse_config(RecommendConfig, args)
    with exit_on_error():
        from llmrec_peft.recipes.recommend import recommend

        recommend(config)


if __name__ == "__main__":
    main()
