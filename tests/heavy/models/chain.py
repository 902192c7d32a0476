"""A LangChain chain, which nothing traces but LangChain's autologging."""

import os

import mlflow
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

prompt = ChatPromptTemplate.from_messages([("system", "You are terse."), ("user", "{question}")])
model = ChatOpenAI(
    model="gpt-test", base_url=f"{os.environ['MODEL_SERVER']}/v1", api_key="secret-key", max_retries=0
)

mlflow.models.set_model(prompt | model | StrOutputParser())
