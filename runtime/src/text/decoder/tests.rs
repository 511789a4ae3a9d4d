use proptest::prelude::*;
use volley_actors::Request;

use super::*;
use crate::text::testing::byte_tokenizer;

fn request(stop: &[&str], stop_tokens: &[u32]) -> TextRequest {
    let mut request = Request::greedy(vec![1, 2, 3], 100);
    request.stop_tokens = stop_tokens.to_vec();
    TextRequest {
        request,
        stop: stop.iter().map(|&s| s.to_owned()).collect(),
        skip_special: true,
    }
}

fn token(token: u32) -> RequestEvent {
    let logprob = TokenLogprob {
        token,
        logprob: -1.0,
        top: Vec::new(),
    };
    RequestEvent::Token {
        token,
        logprob: Some(logprob),
    }
}

fn run(request: &TextRequest, events: impl IntoIterator<Item = RequestEvent>) -> Vec<TextEvent> {
    let mut decoder = Decoder::new(&byte_tokenizer(), request);
    let mut ready = VecDeque::new();
    for event in events {
        decoder.event(event, &mut ready);
    }
    assert!(decoder.ended());
    ready.into()
}

/// Text, tokens, reason and completion tokens of a run.
fn summary(events: &[TextEvent]) -> (String, Vec<u32>, FinishReason, u64) {
    let (mut text, mut tokens) = (String::new(), Vec::new());
    for event in &events[..events.len() - 1] {
        let TextEvent::Delta(delta) = event else {
            panic!("{event:?}")
        };
        text += &delta.text;
        tokens.extend(&delta.tokens);
        assert_eq!(
            delta.logprobs.iter().map(|l| l.token).collect::<Vec<_>>(),
            delta.tokens
        );
    }
    let Some(TextEvent::Finished { reason, usage }) = events.last() else {
        panic!("{events:?}")
    };
    assert_eq!(usage.prompt_tokens, 3);
    (text, tokens, reason.clone(), usage.completion_tokens)
}

fn bytes(text: &str) -> impl Iterator<Item = RequestEvent> {
    text.bytes().map(|byte| token(byte.into()))
}

#[test]
fn a_stop_string_ends_the_text_and_what_comes_later_is_not_counted() {
    let request = request(&["\n\n"], &[]);
    let (text, tokens, reason, count) = summary(&run(&request, bytes("one\ntwo\n\nthree")));
    assert_eq!(
        (text.as_str(), reason, count),
        ("one\ntwo", FinishReason::Stop, 9)
    );
    assert_eq!(
        tokens,
        "one\ntwo\n\n".bytes().map(u32::from).collect::<Vec<_>>()
    );
}

#[test]
fn a_stop_token_is_reported_but_has_no_text() {
    let end = [token(256), RequestEvent::Finished(FinishReason::Stop)];
    let (text, tokens, reason, count) =
        summary(&run(&request(&[], &[256]), bytes("ab").chain(end)));
    assert_eq!(
        (text.as_str(), reason, count),
        ("ab", FinishReason::Stop, 3)
    );
    assert_eq!(tokens, [97, 98, 256]);

    // Also where it is a token with text.
    let end = [token(98), RequestEvent::Finished(FinishReason::Stop)];
    assert_eq!(
        summary(&run(&request(&[], &[98]), bytes("a").chain(end))).0,
        "a"
    );
}

#[test]
fn text_held_back_comes_at_the_end() {
    let end = [RequestEvent::Finished(FinishReason::Length)];
    let (text, _, reason, _) = summary(&run(&request(&["END"], &[]), bytes("x EN").chain(end)));
    assert_eq!((text.as_str(), reason), ("x EN", FinishReason::Length));
}

#[test]
fn a_character_never_finished_becomes_a_replacement() {
    let end = [token(0xe4), RequestEvent::Finished(FinishReason::Length)];
    assert_eq!(summary(&run(&request(&[], &[]), end)).0, "\u{fffd}");
}

#[test]
fn prompt_logprobs_come_first_and_whole() {
    let mut request = request(&[], &[]);
    request.request.prompt_logprobs = Some(0);
    let logprob = |token| TokenLogprob {
        token,
        logprob: -2.0,
        top: Vec::new(),
    };
    let events = run(
        &request,
        [
            RequestEvent::Prompt(vec![logprob(2)]),
            RequestEvent::Prompt(vec![logprob(3)]),
            RequestEvent::Finished(FinishReason::Length),
        ],
    );
    assert_eq!(events[0], TextEvent::Prompt(vec![logprob(2), logprob(3)]));
    assert_eq!(summary(&events[1..]).2, FinishReason::Length);
}

#[test]
fn an_error_is_passed_on_even_after_text() {
    let error = FinishReason::Error("lost".into());
    let end = [RequestEvent::Finished(error.clone())];
    assert_eq!(
        summary(&run(&request(&[], &[]), bytes("ab").chain(end))).2,
        error
    );
}

proptest! {
    /// One token a byte splits every character and every stop string in all possible places.
    #[test]
    fn pieces_are_whole_characters_and_make_up_the_text(text in "[aä€😀 ]{0,20}", stop in "[aä€😀]{1,3}") {
        let end = [RequestEvent::Finished(FinishReason::Length)];
        let events = run(&request(&[&stop], &[]), bytes(&text).chain(end));
        let (shown, _, reason, _) = summary(&events);
        let expected = text.split(stop.as_str()).next().unwrap();
        prop_assert_eq!(&shown, expected);
        prop_assert_eq!(reason == FinishReason::Stop, expected.len() < text.len());
        prop_assert!(!shown.contains(char::REPLACEMENT_CHARACTER));
    }
}
