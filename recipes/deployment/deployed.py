"""Server and client of `recipes.federate` for a Flower deployment, whose machines have this repository in PYTHONPATH.

The run's configuration `arguments` is the recipe's command line, for the server and for every agent.
"""

import shlex
from functools import cache

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from recipes.federate import Federate, main
from recipes.federation.agents import Federation
from recipes.federation.flower import make_client
from recipes.support.methods import Method
from recipes.support.runs import open_recipe

server_app = ServerApp()


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Runs the recipe, whose report is written where the server runs."""
    main(shlex.split(str(context.run_config["arguments"])), grid)


@cache
def recipe_of(arguments: str) -> Federate:
    """Returns the recipe with model and data, as an agent knows it."""
    recipe = open_recipe(Federate, shlex.split(arguments))
    recipe.load()
    return recipe


def known(context: Context) -> tuple[Federation, list[Method]]:
    """Returns what an agent knows."""
    recipe = recipe_of(str(context.run_config["arguments"]))
    return recipe.problem, recipe.methods


client_app = make_client(known)
