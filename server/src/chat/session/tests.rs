//! Conversations with a real front end on a port of its own.

use std::future::pending;

use tokio::net::TcpListener;

use super::*;
use crate::openai::tests::memory_generator::MemoryGenerator;
use crate::openai::tests::support::{Front, config, model_text};

fn flags() -> ChatFlags {
    ChatFlags {
        prompt: Vec::new(),
        url: String::new(),
        model: None,
        api_key: None,
        system: None,
        max_tokens: Some(40),
        temperature: Some(0.0),
        stats: false,
    }
}

async fn served(front: &Front) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = front.router.clone();
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    format!("http://{address}/")
}

fn front_with(
    texts: &[&str],
    set_up: impl FnOnce(MemoryGenerator) -> MemoryGenerator,
    more: impl FnOnce(&mut crate::openai::AppConfig),
) -> Front {
    let mut config = config();
    more(&mut config);
    Front::new(config, model_text(&[]), set_up, texts)
}

async fn session(front: &Front, flags: &ChatFlags) -> Session {
    let client = Client::new(&served(front).await, flags.api_key.clone()).unwrap();
    let model = client.first_model().await.unwrap();
    Session::new(client, model, flags)
}

/// The texts of all prompts that reached the generator.
fn prompts(front: &Front) -> Vec<String> {
    let tokenizer = crate::tokenizer::tests::byte_level();
    let asked = front.generator.asked.lock().unwrap();
    asked.iter().map(|one| tokenizer.decode(&one.prompt, false).unwrap()).collect()
}

#[tokio::test]
async fn each_question_is_asked_with_all_that_was_said() {
    let front = front_with(&["fine"], |generator| generator, |_| {});
    let flags = ChatFlags { system: Some("Be brief.".to_owned()), stats: true, ..flags() };
    let mut session = session(&front, &flags).await;
    let (mut out, mut notes) = (Vec::new(), Vec::new());
    for question in ["How?", "Why?"] {
        assert_eq!(session.next(question, &mut notes).unwrap(), Next::Ask);
        assert_eq!(session.ask(question, pending(), &mut out, &mut notes).await.unwrap(), Turn::Complete);
    }
    assert_eq!(String::from_utf8(out).unwrap(), "fine\nfine\n");
    let notes = String::from_utf8(notes).unwrap();
    assert!(notes.contains("4 out; first after"), "{notes}");
    let turn = |role: &str, text: &str| format!("<|turn|>{role}\n{text}<|end_turn|>\n");
    let first = format!("<|begin|>{}{}", turn("system", "Be brief."), turn("user", "How?"));
    let second = format!("{first}{}{}", turn("assistant", "fine"), turn("user", "Why?"));
    assert_eq!(prompts(&front), [first, second].map(|text| text + "<|turn|>assistant\n"));
}

#[tokio::test]
async fn commands_change_the_conversation_and_ask_nothing() {
    let front = front_with(&["fine"], |generator| generator, |_| {});
    let mut session = session(&front, &flags()).await;
    let mut notes = Vec::new();
    session.ask("How?", pending(), &mut Vec::new(), &mut notes).await.unwrap();
    let rows = [
        ("/help", Next::Listen),
        ("/stats", Next::Listen),
        ("/nonsense", Next::Listen),
        ("/quit", Next::Quit),
    ];
    for (line, expected) in rows {
        assert_eq!(session.next(line, &mut notes).unwrap(), expected, "{line}");
    }
    assert!(session.stats);
    assert_eq!(session.messages.len(), 2);
    session.next("/system  Be glad. ", &mut notes).unwrap();
    assert_eq!((session.system.as_deref(), session.messages.len()), (Some("Be glad."), 0));
    session.next("/system", &mut notes).unwrap();
    assert_eq!(session.system, None);
    session.messages.push(json!({}));
    session.next("/reset", &mut notes).unwrap();
    assert!(session.messages.is_empty());
    assert!(String::from_utf8(notes).unwrap().contains("there is no /nonsense"));
}

#[tokio::test]
async fn a_stopped_answer_is_remembered_as_far_as_it_went_and_cancelled() {
    let front = front_with(&["abcdef"], MemoryGenerator::held_back, |_| {});
    let mut session = session(&front, &flags()).await;
    front.generator.pace.add_permits(2);
    let (told, heard) = tokio::sync::oneshot::channel();
    let mut out = StopAfter { text: String::new(), wanted: "ab", told: Some(told) };
    let stop = async { heard.await.unwrap() };
    let mut notes = Vec::new();
    assert_eq!(session.ask("How?", stop, &mut out, &mut notes).await.unwrap(), Turn::Stopped);
    assert_eq!(session.messages[1]["content"], "ab");
    assert_eq!(String::from_utf8(notes).unwrap(), "[stopped]\n");
    front.generator.tally.until_open(0).await;
}

/// Output that says when enough of it was written.
struct StopAfter {
    text: String,
    wanted: &'static str,
    told: Option<tokio::sync::oneshot::Sender<()>>,
}

impl Write for StopAfter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.text.push_str(std::str::from_utf8(bytes).unwrap());
        if self.text == self.wanted
            && let Some(told) = self.told.take()
        {
            told.send(()).unwrap();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn errors_say_what_to_do() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = listener.local_addr().unwrap().to_string();
    drop(listener);
    let error = Client::new(&nobody, None).unwrap().first_model().await.unwrap_err();
    assert!(error.to_string().contains("tidemill serve"), "{error}");

    let guarded =
        front_with(&["fine"], |generator| generator, |config| config.access.api_keys = vec!["key".into()]);
    let url = served(&guarded).await;
    let error = Client::new(&url, None).unwrap().first_model().await.unwrap_err();
    assert!(error.to_string().contains("--api-key"), "{error}");
    assert_eq!(
        Client::new(&format!("{url}v1"), Some("key".into())).unwrap().first_model().await.unwrap(),
        "tiny"
    );
    assert!(Client::new("http://a b", None).is_err());
}

#[tokio::test]
async fn a_failed_question_can_be_asked_again() {
    let lost = crate::generation::GenerationError::Internal("worker lost".to_owned());
    let front = front_with(&["abc"], |generator| generator.failing(1, lost), |_| {});
    let mut session = session(&front, &flags()).await;
    let mut out = Vec::new();
    let error = session.ask("How?", pending(), &mut out, &mut Vec::new()).await.unwrap_err();
    assert_eq!(error.to_string(), "the answer broke off: worker lost");
    assert_eq!(out, b"a\n");
    assert!(session.messages.is_empty());
    let error = session.ask(&"How? ".repeat(200), pending(), &mut out, &mut Vec::new()).await.unwrap_err();
    assert!(error.to_string().contains("maximum context length"), "{error}");
}
