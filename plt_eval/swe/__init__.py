"""Issues of real repositories, solved by an agent in containers and judged by the official harnesses."""
