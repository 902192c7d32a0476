"""A LangGraph agent with a tool, which nothing traces but LangChain's autologging."""

import os

import mlflow
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def look_up(question: str) -> str:
    """Look a question up."""
    return f"about {question}"


model = ChatOpenAI(
    model="gpt-test", base_url=f"{os.environ['MODEL_SERVER']}/v1", api_key="secret-key", max_retries=0
)

mlflow.models.set_model(create_agent(model, [look_up]))
