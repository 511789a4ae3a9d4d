//! `volley validate --numerics`: the kernels, the exchange and the cache of a whole cluster against the model in plain candle.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use volley_actors::{Cluster, Request, RequestEvent, TokenLogprob};
use volley_models::reference::ReferenceModel;
use volley_models::{ComputeType, ModelDir, Quantization};

use crate::config::Settings;
use crate::failure::Failure;

/// Tokens of the prompt.
const TOKENS: usize = 24;
/// Alternatives compared at each position, beside the prompt's own token.
const ALTERNATIVES: u8 = 5;
/// Largest accepted difference of log-probabilities in f32. Sums differ in order only.
const TOLERANCE_F32: f32 = 0.01;
/// The same in bf16, whose numbers have three decimal digits: activations are rounded before every product.
const TOLERANCE_BF16: f32 = 0.5;
/// The same with weights of 8 bits.
const TOLERANCE_Q8: f32 = 1.0;
/// The same with weights of 4 bits.
const TOLERANCE_Q4: f32 = 3.0;

/// Computes log-probabilities of a short prompt both ways, and prints and judges the largest difference.
///
/// # Errors
/// When the cluster or the reference fails, or the difference is larger than rounding explains.
pub fn run(model: &ModelDir, settings: &Settings) -> Result<(), Failure> {
    let spec = model.spec();
    let mut tokens = prompt(
        spec.vocab,
        TOKENS.min(settings.cluster.context as usize - 1),
    );
    if let Some(bos) = spec.special.bos {
        tokens[0] = bos;
    }
    let cluster = Cluster::start(
        settings.cluster.clone(),
        model.weights(),
        None,
        Arc::new(|_| {}),
    )?;
    let ours = logprobs(&cluster, &tokens);
    cluster.shutdown(Duration::ZERO);
    let ours = ours?;
    let weights = model.weights();
    let reference = ReferenceModel::new(&*weights)
        .forward(&tokens)
        .map_err(|error| Failure::new(format!("the reference implementation failed: {error}")))?;
    let (difference, position) = largest_difference(&ours, &reference, spec.vocab);
    let cluster = &settings.cluster;
    let tolerance = match (cluster.quantize, cluster.dtype) {
        (Some(Quantization::Q4), _) => TOLERANCE_Q4,
        (Some(Quantization::Q8), _) => TOLERANCE_Q8,
        (None, ComputeType::Bf16) => TOLERANCE_BF16,
        (None, ComputeType::F32) => TOLERANCE_F32,
    };
    writeln!(
        std::io::stdout(),
        "numerics   largest difference of log-probabilities from the reference over {} positions: {difference:.2e} at position {position} (limit {tolerance} in {})",
        ours.len(),
        cluster.precision()
    )
    .map_err(Failure::output)?;
    // Written so that NaN is refused too.
    if difference <= tolerance {
        Ok(())
    } else {
        Err(Failure::new(format!(
            "the kernels disagree with the reference by {difference:.2e}, more than {tolerance}; try --dtype f32 --quantize none, and if that differs too, report it"
        )))
    }
}

/// Tokens spread over the vocabulary; no text is needed to compare arithmetic.
fn prompt(vocab: usize, length: usize) -> Vec<u32> {
    (0..length.max(2))
        .map(|i| ((i * 7919 + 11) % vocab) as u32)
        .collect()
}

/// Log-probabilities of the prompt's tokens from the second on, as the cluster has them.
fn logprobs(cluster: &Cluster, tokens: &[u32]) -> Result<Vec<TokenLogprob>, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("no runtime: {error}")))?;
    let client = cluster.client();
    let mut request = Request::greedy(tokens.to_vec(), 0);
    request.prompt_logprobs = Some(ALTERNATIVES);
    runtime.block_on(async {
        let mut stream = client.submit(request).await?;
        let mut all = Vec::new();
        while let Some(event) = stream.next().await {
            match event {
                RequestEvent::Prompt(part) => all.extend(part),
                RequestEvent::Finished(volley_actors::FinishReason::Error(reason)) => {
                    return Err(Failure::new(reason));
                }
                _ => {}
            }
        }
        if all.len() + 1 != tokens.len() {
            let message = format!(
                "{} log-probabilities came back for a prompt of {} tokens",
                all.len(),
                tokens.len()
            );
            return Err(Failure::new(message));
        }
        Ok(all)
    })
}

/// The largest difference, and the position of its token in the prompt. `logits` is `[tokens, vocab]`.
fn largest_difference(ours: &[TokenLogprob], logits: &[f32], vocab: usize) -> (f32, usize) {
    let mut largest = (0.0, 0);
    for (index, (ours, row)) in ours.iter().zip(logits.chunks_exact(vocab)).enumerate() {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let log_sum = f64::from(max)
            + row
                .iter()
                .map(|x| f64::from(x - max).exp())
                .sum::<f64>()
                .ln();
        let pairs = ours.top.iter().copied().chain([(ours.token, ours.logprob)]);
        for (token, logprob) in pairs {
            let difference =
                (f64::from(row[token as usize]) - log_sum - f64::from(logprob)).abs() as f32;
            if difference > largest.0 || difference.is_nan() {
                largest = (difference, index + 1);
            }
        }
    }
    largest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_difference_is_that_of_log_probabilities() {
        let row = [0.0f32, 2f32.ln(), 0.0]; // probabilities 1/4, 1/2, 1/4
        let right = TokenLogprob {
            token: 0,
            logprob: 0.25f32.ln(),
            top: vec![(1, 0.5f32.ln())],
        };
        let (difference, _) = largest_difference(std::slice::from_ref(&right), &row, 3);
        assert!(difference < 1e-6, "{difference}");
        let wrong = TokenLogprob {
            top: vec![(1, 0.25f32.ln())],
            ..right.clone()
        };
        let (difference, position) = largest_difference(&[right, wrong], &[row, row].concat(), 3);
        assert!((difference - 2f32.ln()).abs() < 1e-6, "{difference}");
        assert_eq!(position, 2);
    }

    #[test]
    fn a_difference_that_is_no_number_is_the_largest() {
        let broken = TokenLogprob {
            token: 0,
            logprob: f32::NAN,
            top: vec![],
        };
        assert!(largest_difference(&[broken], &[0.0, 0.0], 2).0.is_nan());
    }
}
