//! The fields of requests as clients write them. What they mean together is decided elsewhere.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::value::SeqAccessDeserializer;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde_json::{Map, Value};
use tidemill_engine_core::request::TokenId;

/// Fields that chat and plain completions share.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct SharedFields {
    pub(crate) model: Option<String>,
    pub(crate) temperature: Option<f64>,
    pub(crate) top_p: Option<f64>,
    pub(crate) top_k: Option<i64>,
    pub(crate) min_p: Option<f64>,
    pub(crate) repetition_penalty: Option<f64>,
    pub(crate) presence_penalty: Option<f64>,
    pub(crate) frequency_penalty: Option<f64>,
    pub(crate) logit_bias: Option<BTreeMap<String, f64>>,
    pub(crate) seed: Option<i64>,
    pub(crate) stop: Option<OneOrMany<String>>,
    pub(crate) stop_token_ids: Option<Vec<TokenId>>,
    pub(crate) include_stop_str_in_output: Option<bool>,
    pub(crate) n: Option<i64>,
    pub(crate) prompt_logprobs: Option<i64>,
    pub(crate) ignore_eos: Option<bool>,
    pub(crate) min_tokens: Option<i64>,
    pub(crate) max_tokens: Option<i64>,
    pub(crate) max_completion_tokens: Option<i64>,
    pub(crate) skip_special_tokens: Option<bool>,
    pub(crate) add_special_tokens: Option<bool>,
    pub(crate) stream: Option<bool>,
    pub(crate) stream_options: Option<StreamOptions>,
    pub(crate) response_format: Option<ResponseFormat>,
    /// Nothing depends on it, but a wrong type is refused as anywhere else.
    #[serde(rename = "user")]
    pub(crate) _user: Option<String>,
}

/// What to send besides text while streaming.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: Option<bool>,
    pub(crate) continuous_usage_stats: Option<bool>,
}

/// The form of the answer.
#[derive(Debug, Deserialize)]
pub(crate) struct ResponseFormat {
    pub(crate) r#type: String,
}

/// Fields of `/v1/chat/completions` alone, besides those of the conversation.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ChatFields {
    pub(crate) logprobs: Option<bool>,
    pub(crate) top_logprobs: Option<i64>,
    pub(crate) tool_choice: Option<Value>,
}

/// Fields of `/v1/completions` alone.
#[derive(Debug, Deserialize)]
pub(crate) struct CompletionFields {
    pub(crate) prompt: Prompts,
    pub(crate) logprobs: Option<i64>,
    pub(crate) echo: Option<bool>,
}

/// Fields that describe a conversation, in chat completions and in `/tokenize`. Fields of messages that only
/// templates know are taken from the body as they are.
#[derive(Debug, Deserialize)]
pub(crate) struct ConversationFields {
    pub(crate) messages: Vec<Message>,
    pub(crate) tools: Option<Vec<Map<String, Value>>>,
    pub(crate) documents: Option<Vec<Map<String, Value>>>,
    pub(crate) add_generation_prompt: Option<bool>,
    pub(crate) chat_template_kwargs: Option<Map<String, Value>>,
}

/// One message.
#[derive(Debug, Deserialize)]
pub(crate) struct Message {
    pub(crate) role: String,
    pub(crate) content: Option<OneOrMany<String, ContentPart>>,
    pub(crate) tool_calls: Option<Vec<ToolCall>>,
}

/// A part of a message.
#[derive(Debug, Deserialize)]
pub(crate) struct ContentPart {
    pub(crate) r#type: String,
    pub(crate) text: Option<String>,
}

/// A call that the model made in an earlier turn.
#[derive(Debug, Deserialize)]
pub(crate) struct ToolCall {
    pub(crate) function: ToolFunction,
}

/// What was called.
#[derive(Debug, Deserialize)]
pub(crate) struct ToolFunction {
    #[serde(rename = "name")]
    pub(crate) _name: String,
    /// JSON in a string, as the API has it, or the object itself, as templates want it.
    pub(crate) arguments: Option<Value>,
}

/// Fields of `/tokenize` besides those of a conversation.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct TokenizeFields {
    pub(crate) model: Option<String>,
    pub(crate) prompt: Option<String>,
    pub(crate) add_special_tokens: Option<bool>,
    pub(crate) return_token_strs: Option<bool>,
}

/// Fields of `/detokenize`.
#[derive(Debug, Deserialize)]
pub(crate) struct DetokenizeFields {
    pub(crate) model: Option<String>,
    pub(crate) tokens: Vec<TokenId>,
}

/// A single value or a list. Written by hand because serde's untagged enums lose the path of what is wrong inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum OneOrMany<One, Item = One> {
    One(One),
    Many(Vec<Item>),
}

/// One or several prompts, each as text or as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Prompts(pub(crate) Vec<Prompt>);

/// One prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    /// To be encoded.
    Text(String),
    /// Taken as they are.
    Tokens(Vec<TokenId>),
}

impl<'de, Item: Deserialize<'de>> Deserialize<'de> for OneOrMany<String, Item> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrManyVisitor<Item>(PhantomData<Item>);

        impl<'de, Item: Deserialize<'de>> Visitor<'de> for OneOrManyVisitor<Item> {
            type Value = OneOrMany<String, Item>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(OneOrMany::One(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Self::Value, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(items)).map(OneOrMany::Many)
            }
        }

        deserializer.deserialize_any(OneOrManyVisitor(PhantomData))
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PromptsVisitor;

        impl<'de> Visitor<'de> for PromptsVisitor {
            type Value = Prompts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a string, a list of strings, a list of token ids, or a list of lists of token ids",
                )
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Prompts(vec![Prompt::Text(text.to_owned())]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
                let (mut prompts, mut tokens) = (Vec::new(), Vec::new());
                while let Some(item) = items.next_element::<PromptItem>()? {
                    match item {
                        PromptItem::Token(id) => tokens.push(id),
                        PromptItem::Prompt(prompt) => prompts.push(prompt),
                    }
                }
                match (prompts.is_empty(), tokens.is_empty()) {
                    (false, true) => Ok(Prompts(prompts)),
                    (true, false) => Ok(Prompts(vec![Prompt::Tokens(tokens)])),
                    (true, true) => Err(de::Error::custom("the list is empty")),
                    (false, false) => Err(de::Error::custom("token ids and prompts are mixed")),
                }
            }
        }

        deserializer.deserialize_any(PromptsVisitor)
    }
}

/// What a list of prompts may hold.
enum PromptItem {
    Token(TokenId),
    Prompt(Prompt),
}

impl<'de> Deserialize<'de> for PromptItem {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ItemVisitor;

        impl<'de> Visitor<'de> for ItemVisitor {
            type Value = PromptItem;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Ok(PromptItem::Prompt(Prompt::Text(text.to_owned())))
            }

            fn visit_u64<E: de::Error>(self, id: u64) -> Result<Self::Value, E> {
                let id = TokenId::try_from(id).map_err(|_| E::custom(format!("{id} is no token id")))?;
                Ok(PromptItem::Token(id))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, ids: A) -> Result<Self::Value, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(ids))
                    .map(|ids| PromptItem::Prompt(Prompt::Tokens(ids)))
            }
        }

        deserializer.deserialize_any(ItemVisitor)
    }
}
