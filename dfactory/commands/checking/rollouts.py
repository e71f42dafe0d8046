"""Section `rollouts`: prompts, rewards and processes of reinforcement learning."""

from dfactory.commands.checking.page import Page
from dfactory.errors import ConfigError
from dfactory.recipe import Recipe
from dfactory.rl.prompts import PromptStream
from dfactory.rl.rewards.specs import load_reward, parse_rewards, required_columns, row_problem


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
    _tell_loss(page, recipe)
    page.line(
        "processes",
        f"{recipe.num_learners} learner(s) and {recipe.num_rollout_workers} rollout actor(s) with the model, a GPU each; "
        f"{recipe.reward_workers} reward process(es)",
    )


def _tell_loss(page: Page, recipe: Recipe) -> None:
    """What the algorithm says of its loss, and what the age of rollouts costs or brings."""
    parts = [recipe.algorithm.summary, *recipe.algorithm.notes(recipe)]
    if recipe.actors_score:
        parts.append(
            "rollout actors score the views of all their rollouts: a forward more on them, none on the learner"
        )
    page.line("loss", *parts)
    for warning in recipe.algorithm.warnings(recipe):
        page.warn(warning)
    if 0 < recipe.max_staleness < recipe.num_iterations:
        page.warn(
            f"max_staleness {recipe.max_staleness} with num_iterations {recipe.num_iterations}: weights come every "
            f"{recipe.num_iterations} versions, so that nothing is decoded ahead; set it to {recipe.num_iterations}, or to 0"
        )
