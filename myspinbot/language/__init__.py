"""How a text is read aloud: markup, numbers, amounts, names, words."""
