"""Section `rollouts`: prompts, rewards and processes of reinforcement learning."""

from dfactory.commands.checking.page import Page
from dfactory.errors import ConfigError
from dfactory.recipe import Recipe
from dfactory.rl.prompts import PromptStream
from dfactory.rl.rewards.specs import load_reward, parse_rewards, required_columns, row_problem

WIDE_CLIP = 0.5  # 0.02 nat of drift a token make a standard deviation of 0.3 in a sum over 256 tokens


def tell_rollouts(page: Page, recipe: Recipe) -> None:
    """Prompts, rewards and processes of reinforcement learning. The rewards are imported, as they would be."""
    prompts = PromptStream(recipe)
    longest = max(map(len, prompts.prompt_ids))
    page.line(
        "prompts", f"{len(prompts.rows):,}, the longest of {longest} tokens; {recipe.decode.max_new_tokens} new ones"
    )
    for line in prompts.report.tell_refused():
        page.warn(line)
    rewards = parse_rewards(
        recipe.reward_funcs, recipe.reward_weights, allow_code_execution=recipe.allow_code_execution
    )
    for reward in rewards:
        function = load_reward(reward)
        columns = required_columns(function)
        asks = f"asks for the columns {', '.join(columns)}" if columns else "asks for no column"
        page.line("reward", f"{reward.name}, weight {reward.weight:g}; {asks}")
        problems = ((row.origin, row_problem(reward, function, row.fields)) for row in prompts.rows)
        if found := next((f"{origin}: {problem}" for origin, problem in problems if problem), None):
            page.problem(ConfigError(found))
    page.line(
        "a step",
        f"{recipe.prompts_per_step} prompts x {recipe.num_generations} rollouts = "
        f"{recipe.prompts_per_step * recipe.num_generations}, {recipe.num_iterations} optimiser step(s) on them",
        f"rollouts at most {recipe.max_staleness} policy version(s) old",
    )
    _tell_ratio(page, recipe)
    _warn_of_objective(page, recipe)
    page.line(
        "processes",
        f"{recipe.num_learners} learner(s) and {recipe.num_rollout_workers} rollout actor(s) with the model, a GPU each; "
        f"{recipe.reward_workers} reward process(es)",
    )


def _tell_ratio(page: Page, recipe: Recipe) -> None:
    """Where the ratio can differ from 1, and what corrects what the decoder drew from another distribution."""
    parts = []
    if recipe.num_iterations == 1 and (not recipe.decodes_ahead or recipe.old_policy == "learner"):
        parts.append(
            "1 at every step, because no step lies between: epsilon, epsilon_high and ratio_clip have no effect. They have "
            "with num_iterations above 1, or with max_staleness and old_policy decoder"
        )
    else:
        parts.append(f"clipped to {1 - recipe.epsilon:g} and {1 + recipe.highest_epsilon:g}")
    if recipe.actors_score:
        parts.append(
            "rollout actors score the views of all their rollouts: a forward more on them, none on the learner"
        )
    if recipe.policy_loss != "trace":
        parts.append("importance_cap has no effect: the decoder has no record of the views that are trained on")
    page.line("ratio", *parts)
    if 0 < recipe.max_staleness < recipe.num_iterations:
        page.warn(
            f"max_staleness {recipe.max_staleness} with num_iterations {recipe.num_iterations}: weights come every "
            f"{recipe.num_iterations} versions, so that nothing is decoded ahead; set it to {recipe.num_iterations}, or to 0"
        )


def _warn_of_objective(page: Page, recipe: Recipe) -> None:
    """Combinations that the method's arithmetic makes unstable."""
    if recipe.policy_loss != "ebpo":
        return
    if recipe.ratio_normalisation == "sum" and recipe.epsilon < WIDE_CLIP:
        page.warn(
            f"epsilon {recipe.epsilon:g} with ratio_normalisation sum: the ratio of a whole response leaves that range by "
            "noise alone; use ratio_normalisation mean, or a range that is meant for sums"
        )
    if recipe.kl_coef > 0 and recipe.kl_estimator == "k3":
        page.warn("kl_estimator k3 with policy_loss ebpo explodes on ELBO differences: use k2")
