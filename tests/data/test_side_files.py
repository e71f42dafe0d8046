"""What belongs to a tokenizer besides its ids: a mask that is a word, named templates, templates that print the date."""

import datetime

import numpy as np
from transformers import AutoTokenizer

from dfactory.data.chat import ChatEncoder, mask_warning
from dfactory.data.rendering import DATE
from dfactory.models.saving import CHAT_TEMPLATE, carry_files, write_chat_template

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
NAMED = {"default": "{{ messages[0].content }}D", "tool_use": "{{ messages[0].content }}{{ tools | tojson }}T"}


def test_an_ordinary_word_as_the_mask_is_told(tokenizer):
    word = tokenizer.convert_tokens_to_ids("the")
    assert f"mask_token_id {word} is the ordinary token 'the'" in mask_warning(tokenizer, word)
    assert mask_warning(tokenizer, tokenizer.mask_token_id) is None
    assert mask_warning(tokenizer, len(tokenizer) + 1) is None  # names no token
    assert mask_warning(None, 7) is None


def test_named_templates_go_along(tokenizer, tmp_path):
    """As transformers saves them: the default beside the tokenizer, the others in a folder."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    tokenizer.save_pretrained(source)
    named = AutoTokenizer.from_pretrained(source)
    named.chat_template = NAMED
    named.save_pretrained(source)
    copy.mkdir()
    carry_files(source, copy)
    assert AutoTokenizer.from_pretrained(copy).chat_template == NAMED
    assert AutoTokenizer.from_pretrained(source).chat_template == NAMED


def test_a_template_of_the_recipe_takes_the_place_of_all(tokenizer, tmp_path):
    """The run was trained with it alone, tools included."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    tokenizer.save_pretrained(source)
    named = AutoTokenizer.from_pretrained(source)
    named.chat_template = NAMED
    named.save_pretrained(source)
    copy.mkdir()
    write_chat_template(copy, "{{ messages[0].content }}R")
    carry_files(source, copy)
    read = AutoTokenizer.from_pretrained(copy)
    assert read.get_chat_template(tools=[{"name": "f"}]) == "{{ messages[0].content }}R"
    assert (copy / CHAT_TEMPLATE).read_text() == "{{ messages[0].content }}R"


def test_a_template_that_prints_the_date_gives_the_same_tokens_tomorrow(tokenizer, monkeypatch):
    template = "{{ strftime_now('%d %b %Y') }} " + tokenizer.chat_template
    today = ChatEncoder(tokenizer, template).encode_messages(TURNS)[0]
    from transformers.utils import chat_template_utils

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.now() + datetime.timedelta(days=1)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert np.array_equal(ChatEncoder(tokenizer, template).encode_messages(TURNS)[0], today)
    assert tokenizer.decode(today).startswith(DATE.strftime("%d %b %Y"))


# --- the beginning of plain text --------------------------------------------------------------------------------------


def beginning(tokenizer, token):
    """The tokenizer, putting a token in front of every text, as Llama's and Gemma's do."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    index = tokenizer.convert_tokens_to_ids(token)
    backend.post_processor = processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, index)])
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "mask_token", "chat_template")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def test_plain_text_begins_as_the_tokenizer_begins_it(tokenizer, write, load, show):
    from dfactory.data.prompts import Row, encode_prompt
    from dfactory.data.records import Completion, Conversation

    with_bos = beginning(tokenizer, "<|startoftext|>")
    records = [Completion("the", "the end"), Completion("", "hi"), Conversation(TURNS)]
    shown = [show(*tokens) for tokens in ChatEncoder(with_bos).encode_records(records)]
    assert shown[:2] == ["<|startoftext|>the[the end]", "<|startoftext|>[hi]"]
    assert "startoftext" not in shown[2]  # what a conversation begins with is the template's
    ids = encode_prompt(Row("x", {"prompt": "the"}), ChatEncoder(with_bos))
    assert ids == with_bos("the")["input_ids"] == [0, *ChatEncoder(tokenizer).encode_text("the")]
    assert ChatEncoder(with_bos).encode_text("the") == ChatEncoder(tokenizer).encode_text(
        "the"
    )  # it may go on with a text
    plain = [show(*tokens) for tokens in ChatEncoder(tokenizer).encode_records(records)]
    assert plain[:2] == ["the[the end]", "[hi]"]  # LLaDA2's and Qwen's add nothing


def test_a_split_text_has_its_beginning_once(tokenizer, write, load):
    encoder = ChatEncoder(beginning(tokenizer, "<|startoftext|>"))
    examples = load(write({"text": "x" * 70}), encoder=encoder, overlong="split")
    assert [len(example) for example in examples] == [32, 32, 8]  # BOS, 70 characters, EOS
    assert [int(example.input_ids_T[0]) for example in examples] == [
        0,
        examples[1].input_ids_T[0],
        examples[2].input_ids_T[0],
    ]
    assert [int((example.input_ids_T == 0).sum()) for example in examples] == [1, 0, 0]
    assert not examples[0].trainable_T[0]
    assert examples[0].trainable_T[1:].all()
