//! One row per rule: happenings as words on the left, actions as words on the right.
//!
//! `split` and `whole` answer a search for a route with workers 1 and 2, or 2 alone; `split34` takes 3 and 4. `p0`,
//! `d1`, `a0` are tokens of the prefill worker, the decode worker, the only worker, with their index; the token with
//! index `i` has id `10 + i`. `=0` is a token that the client gets. `find-1` is a search that excludes worker 1.

use super::*;

#[test]
#[rustfmt::skip]
fn journeys() {
    let rows = [
        // what is shown                                     what happens                                  what is done after `find`
        ("both sides start, tokens come in order",           "split p0 p-over d1 d2 d-end",                "start-d2 start-p1 =0 =1 =2 end"),
        ("decode's stream may be quicker than prefill's",    "split d1 d2 p0 p-over d-end",                "start-d2 start-p1 =0 =1 =2 end"),
        ("even its end waits for the first token",           "split d1 d-end p0",                          "start-d2 start-p1 =0 =1 end release-p"),
        ("a repeated token is dropped",                      "split p0 p0 p-over d0 d1 d-end",             "start-d2 start-p1 =0 =1 end"),
        ("a first token that ends it lets decode end too",   "split p0 p-end",                             "start-d2 start-p1 =0 end release-d"),
        ("an end of decode lets prefill tidy up",            "split p0 d1 d-end",                          "start-d2 start-p1 =0 =1 end release-p"),
        ("one worker does it all",                           "whole a0 a1 a-end",                          "start-a2 =0 =1 end"),
        ("a fallback is counted",                            "alone a0 a-end",                             "count:unlinked start-a2 =0 end"),
        ("prompt logprobs come once",                        "split p-logprobs p-lost split34 p-logprobs", "start-d2 start-p1 logprobs count:prefill-lost stop-d find-1 start-d4 start-p3"),
        ("nothing is said after the end",                    "whole a0 a-end a1 a-lost",                   "start-a2 =0 end"),

        ("prefill lost before its token: replay elsewhere",  "split p-lost split34 p0",                    "start-d2 start-p1 count:prefill-lost stop-d find-1 start-d4 start-p3 =0"),
        ("prefill lost, decode already ahead: replay",       "split d1 p-lost whole a0 a1 a2 a-end",       "start-d2 start-p1 count:prefill-lost stop-d find-1 start-a2 =0 =1 =2 end"),
        ("prefill lost after its token: decode decides",     "split p0 p-lost d1 d-end",                   "start-d2 start-p1 =0 timer =1 end"),
        ("… and if decode lacks the cache: replay",          "split p0 p-lost d-reroute whole a1 a-end",   "start-d2 start-p1 =0 timer count:prefill-lost stop-d find-1 start-a2 =1 end"),
        ("… and if decode says nothing: replay",             "split p0 p-lost overdue whole a1",           "start-d2 start-p1 =0 timer count:prefill-lost stop-d find-1 start-a2 =1"),
        ("a late timer changes nothing",                     "split p0 p-lost d1 overdue d2 d-end",        "start-d2 start-p1 =0 timer =1 =2 end"),
        ("prefill lost after decode went on: nothing",       "split p0 d1 p-lost d2 d-end",                "start-d2 start-p1 =0 =1 =2 end"),
        ("prefill failed after decode went on: nothing",     "split p0 d1 p-reroute d2 d-end",             "start-d2 start-p1 =0 =1 =2 end"),
        ("prefill failed: another pair",                     "split p-reroute split34",                    "start-d2 start-p1 count:prefill-failed stop-d find-1 start-d4 start-p3"),
        ("decode refuses the cache: not this prefill again", "split p0 p-over d-reroute whole a1",         "start-d2 start-p1 =0 count:handoff-failed stop-d find-1 start-a2 =1"),
        ("… but prefill has its say first",                  "split p0 d-reroute p-over whole a1",         "start-d2 start-p1 =0 timer count:handoff-failed stop-d find-1 start-a2 =1"),
        ("… which may be that all is done",                  "split d-reroute p0 p-end",                   "start-d2 start-p1 timer =0 end"),
        ("… or that it failed too",                          "split p0 d-reroute p-reroute whole a1",      "start-d2 start-p1 =0 timer count:prefill-failed stop-d find-1 start-a2 =1"),
        ("… or nothing, being lost",                         "split p0 d-reroute p-lost whole a1",         "start-d2 start-p1 =0 timer count:prefill-lost stop-d find-1 start-a2 =1"),
        ("… or nothing in time",                             "split p0 d-reroute overdue whole a1",        "start-d2 start-p1 =0 timer count:handoff-failed stop-p stop-d find-1 start-a2 =1"),
        ("decode lost before prefill is done",               "split d-lost split34",                       "start-d2 start-p1 count:decode-lost stop-p find-2 start-d4 start-p3"),
        ("decode lost mid-stream: replay what has left",     "split p0 p-over d1 d-lost split34 p2 d3",    "start-d2 start-p1 =0 =1 count:decode-lost find-2 start-d4 start-p3 =2 =3"),
        ("the only worker lost mid-stream",                  "whole a0 a-lost whole a1 a-end",             "start-a2 =0 count:worker-lost find-2 start-a2 =1 end"),
        ("tokens ahead of a gap are computed again",         "split p0 p-over d1 d3 d-lost whole a2 a3",   "start-d2 start-p1 =0 =1 count:decode-lost find-2 start-a2 =2 =3"),
        ("a token that never comes is computed again",       "split d1 d-end p-over exhausted whole a0 a1", "start-d2 start-p1 count:stream-incomplete find-2 start-a2 =0 =1"),
        ("lost after the last token: it had ended",          "whole a0 a1 a2 a3 a4 a5 a-lost",             "start-a2 =0 =1 =2 =3 =4 =5 count:worker-lost end"),
        ("lost after the stop token: it had ended",          "whole stop0 a-lost",                         "start-a2 =0 count:worker-lost end"),

        ("a full prefill worker: another, without waiting",  "split p-later split34 p0",                   "start-d2 start-p1 count:prefill-full stop-d find-1! start-d4 start-p3 =0"),
        ("all full: the client hears it at once",            "split d-later none",                         "start-d2 start-p1 count:decode-full stop-p find-2! busy"),
        ("a stream that has begun waits for a place",        "split p0 p-over d1 d-lost whole a-later",    "start-d2 start-p1 =0 =1 count:decode-lost find-2 start-a2 count:worker-full find-2"),
        ("nobody there: unavailable",                        "none",                                       "unavailable"),
        ("a failure for good ends both sides",               "split p-giveup",                             "start-d2 start-p1 fail stop-p stop-d"),
        ("a failure for good of decode too",                 "split p0 d-giveup",                          "start-d2 start-p1 =0 fail stop-p stop-d"),
    ];
    for (name, happenings, expected) in rows {
        let mut journey = journey();
        assert_eq!(render(&journey.begin()), "find", "{name}");
        let actions: Vec<Action> = happenings.split(' ').flat_map(|word| journey.on(happening(word))).collect();
        assert_eq!(render(&actions), expected, "{name}");
    }
}

#[test]
fn attempts_are_bounded() {
    let mut journey = journey();
    journey.begin();
    let mut last = Vec::new();
    for attempt in 1..=MAX_ATTEMPTS {
        assert!(!journey.is_over(), "attempt {attempt} is allowed");
        journey.on(happening("whole"));
        last = journey.on(happening("a-lost"));
    }
    assert!(journey.is_over());
    assert_eq!(render(&last), "count:worker-lost fail");
}

#[test]
fn a_full_model_has_ended_when_its_worker_is_lost() {
    let mut journey = Journey::new(StopConditions::after(100), 2);
    journey.begin();
    let words = ["whole", "a0", "a1", "a-lost"];
    let actions: Vec<Action> = words.iter().flat_map(|word| journey.on(happening(word))).collect();
    assert_eq!(render(&actions), "start-a2 =0 =1 count:worker-lost end");
}

/// Ends after six tokens or with token 99.
fn journey() -> Journey {
    let stop = StopConditions { stop_token_ids: vec![99], ..StopConditions::after(6) };
    Journey::new(stop, 1000)
}

fn happening(word: &str) -> Happening {
    let failed = |recovery| EngineEvent::Failed { recovery, message: "why".into() };
    match word {
        "split" => return Happening::Routed(Route::Split { prefill: Instance(1), decode: Instance(2) }),
        "split34" => return Happening::Routed(Route::Split { prefill: Instance(3), decode: Instance(4) }),
        "whole" => return Happening::Routed(Route::Whole { worker: Instance(2), fallback: None }),
        "alone" => {
            return Happening::Routed(Route::Whole { worker: Instance(2), fallback: Some("unlinked") });
        }
        "none" => return Happening::Unroutable("none".into()),
        "overdue" => return Happening::AdoptionOverdue,
        "exhausted" => return Happening::Exhausted,
        "stop0" => {
            return Happening::From(Side::Alone, EngineEvent::Token { id: 99, index: 0, logprobs: None });
        }
        _ => {}
    }
    let (side, what) = word.split_at(1);
    let side = match side {
        "p" => Side::Prefill,
        "d" => Side::Decode,
        "a" => Side::Alone,
        other => panic!("`{other}` is no side"),
    };
    let event = match what {
        "-over" => EngineEvent::HandedOver,
        "-end" => EngineEvent::Finished { reason: FinishReason::Length, cached_tokens: 0 },
        "-reroute" => failed(Recovery::Reroute),
        "-later" => failed(Recovery::Later),
        "-giveup" => failed(Recovery::GiveUp),
        "-logprobs" => EngineEvent::PromptLogprobs(Vec::new()),
        "-lost" => return Happening::Lost(side, "why".into()),
        index => {
            let index: u32 = index.parse().unwrap_or_else(|_| panic!("`{word}` is no happening"));
            EngineEvent::Token { id: 10 + index, index, logprobs: None }
        }
    };
    Happening::From(side, event)
}

fn render(actions: &[Action]) -> String {
    let mut index = 0;
    let words: Vec<String> = actions
        .iter()
        .map(|action| match action {
            Action::FindRoute { excluded, wait } => {
                let excluded: String = excluded.iter().map(|it| format!("-{}", it.0)).collect();
                format!("find{excluded}{}", if *wait { "" } else { "!" })
            }
            Action::Start { side, worker, .. } => format!("start-{}{}", letter(*side), worker.0),
            Action::Stop(side) => format!("stop-{}", letter(*side)),
            Action::Release(side) => format!("release-{}", letter(*side)),
            Action::AwaitAdoption => "timer".into(),
            Action::Fallback { reason, .. } => format!("count:{reason}"),
            Action::Emit(GenerationEvent::Token { id, .. }) => {
                assert!(*id == 99 || *id == 10 + index, "token {index} is in its place, not {id}");
                index += 1;
                format!("={}", index - 1)
            }
            Action::Emit(GenerationEvent::PromptLogprobs(_)) => "logprobs".into(),
            Action::Emit(GenerationEvent::Finished { .. }) => "end".into(),
            Action::Emit(GenerationEvent::Failed(error)) => match error {
                GenerationError::Busy { .. } => "busy".into(),
                GenerationError::Unavailable(_) => "unavailable".into(),
                GenerationError::Internal(_) => "fail".into(),
            },
        })
        .collect();
    words.join(" ")
}

fn letter(side: Side) -> char {
    match side {
        Side::Prefill => 'p',
        Side::Decode => 'd',
        Side::Alone => 'a',
    }
}
