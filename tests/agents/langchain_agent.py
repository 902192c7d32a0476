"""LangChain chains and LangGraph agents as users write them, behind one FastAPI app.

The model is where ``MODEL_SERVER`` says. ``AUTOLOG`` holds the arguments of ``mlflow.langchain.autolog``.
"""

import asyncio
import json
import operator
import os
from collections.abc import AsyncIterator, Iterator
from functools import cache
from typing import Annotated, Any, Final, TypedDict

import mlflow
import mlflow.langchain
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from langchain.agents import create_agent
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnablePassthrough
from langchain_core.tools import BaseTool, tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command, Send, interrupt
from pydantic import SecretStr

mlflow.langchain.autolog(**json.loads(os.environ.get("AUTOLOG", "{}")))

app = FastAPI()

Body = dict[str, Any]
DOCUMENTS: Final = (
    "Returns are free within 30 days.",
    "Shipping takes two days.",
    "Gift cards never expire.",
)


@cache
def model(behaviour: str = "") -> ChatOpenAI:
    return ChatOpenAI(
        model="gpt-4o-mini",
        base_url="/".join(filter(None, [os.environ["MODEL_SERVER"], behaviour, "v1"])),
        api_key=SecretStr("secret-key"),
        max_retries=0,
        temperature=0,
        stream_usage=True,
    )


# --- chains ---


class Shop(BaseRetriever):
    """Finds what shares a word with the question."""

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        if "unsearchable" in query:
            raise ConnectionError("the index is away")
        words = set(query.lower().split())
        return [
            Document(page_content=text, metadata={"source": f"faq/{number}"}, id=str(number))
            for number, text in enumerate(DOCUMENTS)
            if words & set(text.lower().split())
        ]


def joined(documents: list[Document]) -> str:
    return "\n".join(document.page_content for document in documents)


@cache
def chain(behaviour: str = "") -> Runnable[Any, str]:
    prompt = ChatPromptTemplate.from_messages([("system", "Answer from: {context}"), ("user", "{question}")])
    sources: Any = {"context": Shop() | joined, "question": RunnablePassthrough()}
    chained: Runnable[Any, str] = sources | prompt | model(behaviour) | StrOutputParser()
    return chained


@app.post("/chain/invoke")
def invoke(body: Body) -> Body:
    return {"answer": chain(body.get("behaviour", "")).invoke(body["question"])}


@app.post("/chain/ainvoke")
async def ainvoke(body: Body) -> Body:
    return {"answer": await chain(body.get("behaviour", "")).ainvoke(body["question"])}


@app.post("/chain/batch")
def batch(body: Body) -> Body:
    return {"answers": chain().batch(body["questions"])}


@app.post("/chain/abatch")
async def abatch(body: Body) -> Body:
    return {"answers": await chain().abatch(body["questions"])}


@app.post("/chain/stream")
def stream(body: Body) -> StreamingResponse:
    def chunks() -> Iterator[str]:
        for chunk in chain(body.get("behaviour", "")).stream(body["question"]):
            yield event(chunk)

    return StreamingResponse(chunks(), media_type="text/event-stream")


@app.post("/chain/astream")
async def astream(body: Body) -> StreamingResponse:
    async def chunks() -> AsyncIterator[str]:
        async for chunk in chain(body.get("behaviour", "")).astream(body["question"]):
            yield event(chunk)

    return StreamingResponse(chunks(), media_type="text/event-stream")


@app.post("/chain/fallback")
async def fallback(body: Body) -> Body:
    """A model that fails, and one that stands in for it."""
    message = await model("broken").with_fallbacks([model()]).ainvoke(body["question"])
    return {"answer": message.content}


@app.post("/chain/traced")
@mlflow.trace(span_type="AGENT")
def traced(body: Body) -> Body:
    """MLflow's decorator around a chain."""
    return {"answer": chain().invoke(body["question"])}


def event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


# --- agents with a tool ---


@tool
def lookup(topic: str) -> str:
    """Look a topic up."""
    return f"all about {topic}"


@tool
async def alookup(topic: str) -> str:
    """Look a topic up."""
    await asyncio.sleep(0.001)
    return f"all about {topic}"


@tool
def failing(topic: str) -> str:
    """Look a topic up."""
    raise ValueError(f"nothing about {topic}")


@tool
def nested(topic: str) -> str:
    """Look a topic up."""
    with mlflow.start_span("inside", span_type="PARSER") as span:
        span.set_inputs({"topic": topic})
        return f"all about {topic}"


@tool
async def anested(topic: str) -> str:
    """Look a topic up."""
    with mlflow.start_span("inside", span_type="PARSER") as span:
        span.set_inputs({"topic": topic})
        await asyncio.sleep(0.001)
        return f"all about {topic}"


@tool
def asking(topic: str) -> str:
    """Ask another model."""
    return str(model().invoke(f"what of {topic}").content)


TOOLS: Final[dict[str, BaseTool]] = {
    each.name: each for each in (lookup, alookup, failing, nested, anested, asking)
}


@cache
def agent(name: str, behaviour: str = "") -> Any:
    return create_agent(model(behaviour), [TOOLS[name]], system_prompt="You help.", name="helper")


def question(body: Body) -> Any:
    return {"messages": [{"role": "user", "content": body["question"]}]}


def answer(state: Any) -> Body:
    return {"answer": state["messages"][-1].content}


@app.post("/agent/invoke")
def agent_invoke(body: Body) -> Body:
    return answer(agent(body["tool"], body.get("behaviour", "")).invoke(question(body)))


@app.post("/agent/ainvoke")
async def agent_ainvoke(body: Body) -> Body:
    return answer(await agent(body["tool"], body.get("behaviour", "")).ainvoke(question(body)))


@app.post("/agent/astream")
async def agent_astream(body: Body) -> StreamingResponse:
    """Tokens as the model says them, and the name of each step that is done."""
    graph = agent(body["tool"], body.get("behaviour", ""))

    async def chunks() -> AsyncIterator[str]:
        async for mode, value in graph.astream(question(body), stream_mode=["messages", "updates"]):
            if mode == "updates":
                yield event({"finished": list(value)})
            elif value[0].text:
                yield event({"token": value[0].text})

    return StreamingResponse(chunks(), media_type="text/event-stream")


@app.post("/agent/traced")
@mlflow.trace(span_type="AGENT")
async def agent_traced(body: Body) -> Body:
    """MLflow's decorator around an agent."""
    return answer(await agent(body["tool"]).ainvoke(question(body)))


# --- a graph that waits for a person ---


class Order(TypedDict, total=False):
    item: str
    approved: bool
    steps: Annotated[list[str], operator.add]


def approve(state: Order) -> Order:
    return {"approved": interrupt({"approve": state["item"]}), "steps": ["approved"]}


def ship(state: Order) -> Order:
    return {"steps": [f"shipped {state['item']}"]}


def build_orders() -> Any:
    graph = StateGraph(Order)
    graph.add_node("approve", approve)
    graph.add_node("ship", ship)
    graph.add_edge(START, "approve")
    graph.add_edge("approve", "ship")
    graph.add_edge("ship", END)
    return graph.compile(checkpointer=InMemorySaver(), name="order")


ORDERS: Final = build_orders()


@app.post("/order")
def order(body: Body) -> Body:
    state = ORDERS.invoke({"item": body["item"]}, thread_of(body))
    return {"asks": [pause.value for pause in state["__interrupt__"]]}


@app.post("/order/approve")
async def approve_order(body: Body) -> Body:
    state = await ORDERS.ainvoke(Command(resume=True), thread_of(body))
    return {"steps": state["steps"]}


def thread_of(body: Body) -> Any:
    return {"configurable": {"thread_id": body["thread"]}}


# --- a graph that asks the model several things at once ---


class Survey(TypedDict, total=False):
    topics: list[str]
    topic: str
    answers: Annotated[list[str], operator.add]


def ask(state: Survey) -> Survey:
    return {"answers": [str(model().invoke(state["topic"]).content)]}


def each_topic(state: Survey) -> list[Send]:
    return [Send("ask", {"topic": topic}) for topic in state["topics"]]


def build_survey() -> Any:
    graph = StateGraph(Survey)
    graph.add_node("ask", ask)
    graph.add_conditional_edges(START, each_topic)
    graph.add_edge("ask", END)
    return graph.compile(name="survey")


SURVEY: Final = build_survey()


@app.post("/survey")
def survey(body: Body) -> Body:
    return {"answers": SURVEY.invoke({"topics": body["topics"]})["answers"]}


@app.post("/survey/async")
async def async_survey(body: Body) -> Body:
    return {"answers": (await SURVEY.ainvoke({"topics": body["topics"]}))["answers"]}
