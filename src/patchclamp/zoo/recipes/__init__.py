"""How the trained models of the zoo were made: one recipe a file, run as `python -m patchclamp.zoo.recipes.NAME --out FOLDER`."""
