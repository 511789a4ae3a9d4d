//! What happens when parts of a running cluster fail: nobody notices but for the pause.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use common::{Answer, ask, config, join_all, model, request, start};
use volley_actors::protocol::{Now, SchedulerEvent, StepPlan, Work};
use volley_actors::{
    Cluster, ClusterConfig, FinishReason, FirstCome, PolicyScheduler, Request, RequestEvent,
    Scheduler, SubmitError, scheduler,
};
use volley_models::ComputeType;
use volley_transports::{MicroBatch, Role};

const SHAPE: (u16, u16, u8) = (2, 3, 2);

#[tokio::test]
async fn requests_survive_the_crash_of_any_worker_bit_for_bit() {
    let model = model("tiny-mixtral");
    let requests: Vec<Request> = (0..12)
        .map(|i| Request {
            max_tokens: 60,
            ..request(i, 5 + i * 9, model.spec().vocab)
        })
        .collect();
    let calm = start(&model, config(SHAPE, ComputeType::F32), None);
    let expected = join_all(requests.iter().map(|r| ask(&calm, r.clone()))).await;
    drop(calm);
    for (expert_replicas, spare_experts) in [(1, 0), (2, 0), (1, 4)] {
        let config = ClusterConfig {
            expert_replicas,
            spare_experts,
            ..config(SHAPE, ComputeType::F32)
        };
        crash_three(start(&model, config, None), &requests, &expected).await;
    }
}

/// An expert worker, an attention worker and another expert worker, while requests run.
async fn crash_three(cluster: Cluster, requests: &[Request], expected: &[Answer]) {
    let answers = join_all(requests.iter().map(|r| ask(&cluster, r.clone())));
    let crashes = async {
        for worker in [
            Role::Expert.worker(1),
            Role::Attention.worker(0),
            Role::Expert.worker(2),
        ] {
            tokio::time::sleep(Duration::from_millis(30)).await;
            cluster.crash(worker);
        }
    };
    let (answers, ()) = tokio::join!(answers, crashes);
    assert_eq!(answers, expected);
    // The requests may have been quicker than the last crash, which must then be mended all the same.
    let again = join_all(requests.iter().map(|r| ask(&cluster, r.clone()))).await;
    assert_eq!(again, expected);
    let epoch = cluster
        .client()
        .status()
        .await
        .expect("the frontend answers")
        .epoch;
    // An attention worker that is gone and one that comes back are an epoch each, unless it comes back at once.
    assert!(epoch >= 4, "three crashes and {epoch} epochs");
}

#[tokio::test]
async fn a_cluster_that_fails_again_and_again_gives_up_with_a_reason() {
    let model = model("tiny-mixtral");
    let cluster = start(&model, config(SHAPE, ComputeType::F32), None);
    let endless = Request {
        max_tokens: 200,
        ..request(1, 10, model.spec().vocab)
    };
    // Crashes of a worker that is still being rebuilt are one loss together, so no fixed number of them is enough on a busy machine.
    let crashes = async {
        let until = Instant::now() + Duration::from_secs(30);
        while cluster.client().submit(endless.clone()).await.err() != Some(SubmitError::Draining) {
            assert!(Instant::now() < until, "the cluster does not give up");
            cluster.crash(Role::Expert.worker(0));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let (answers, ()) = tokio::join!(
        join_all((0..20).map(|_| ask(&cluster, endless.clone()))),
        crashes
    );
    for answer in answers {
        match answer.reason {
            Some(FinishReason::Length) => assert_eq!(answer.tokens.len(), 200),
            Some(FinishReason::Error(reason)) => assert!(reason.contains("expert-0"), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
    let refused = cluster.client().submit(endless).await.err();
    assert_eq!(refused, Some(SubmitError::Draining));
    let status = cluster
        .client()
        .status()
        .await
        .expect("the frontend answers");
    assert!(
        status
            .failed
            .is_some_and(|reason| reason.contains("expert-0"))
    );
}

#[tokio::test]
async fn a_dropped_stream_frees_its_place_and_a_shutdown_ends_requests_with_a_reason() {
    let model = model("tiny-mixtral");
    let cluster = start(&model, config((1, 1, 1), ComputeType::F32), None);
    let client = cluster.client();
    let long = Request {
        max_tokens: 200,
        ..request(1, 10, model.spec().vocab)
    };
    let mut stream = client.submit(long.clone()).await.unwrap();
    assert!(stream.next().await.is_some());
    drop(stream);
    let gone = async {
        while client.status().await.expect("the frontend answers").live > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone)
        .await
        .expect("the request was cancelled");

    let mut stream = client.submit(long).await.unwrap();
    let shutdown = tokio::task::spawn_blocking(move || cluster.shutdown(Duration::ZERO));
    let mut last = None;
    while let Some(event) = stream.next().await {
        last = Some(event);
    }
    shutdown.await.unwrap();
    match last {
        Some(RequestEvent::Finished(FinishReason::Error(reason))) => {
            assert!(reason.contains("shut down"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    let stopped = client.submit(request(2, 3, model.spec().vocab)).await.err();
    assert_eq!(stopped, Some(SubmitError::Stopped));
}

/// Plans well, but panics at every third event of its life, and its plans are mixed with nonsense.
struct Unruly {
    inner: PolicyScheduler<FirstCome>,
    events: u32,
    made: Arc<AtomicU32>,
}

impl Scheduler for Unruly {
    fn handle(&mut self, event: &SchedulerEvent, now: Now, plans: &mut Vec<StepPlan>) {
        self.events += 1;
        let life = self.made.load(Ordering::Relaxed);
        assert!(
            life > 3 || self.events < 40,
            "a defect of a user's scheduler"
        );
        self.inner.handle(event, now, plans);
        let nonsense = |micro_batch, worker, tokens| StepPlan {
            micro_batch: MicroBatch(micro_batch),
            work: vec![Work {
                sequence: volley_actors::protocol::SequenceId(999),
                worker,
                tokens,
            }],
            preempt: vec![volley_actors::protocol::SequenceId(7777)],
        };
        plans.push(nonsense(200, 0, 1));
        plans.push(nonsense(0, 77, 0));
        plans.push(nonsense(1, 1, u32::MAX));
    }
}

#[tokio::test]
async fn a_scheduler_that_panics_and_talks_nonsense_loses_nothing() {
    let model = model("tiny-mixtral");
    let requests: Vec<Request> = (0..12)
        .map(|i| Request {
            max_tokens: 30,
            ..request(i, 5 + i * 9, model.spec().vocab)
        })
        .collect();
    let calm = start(&model, config(SHAPE, ComputeType::F32), None);
    let expected = join_all(requests.iter().map(|r| ask(&calm, r.clone()))).await;

    let made = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&made);
    let unruly = scheduler(move || {
        count.fetch_add(1, Ordering::Relaxed);
        Unruly {
            inner: PolicyScheduler::new(FirstCome::new(24, 2)),
            events: 0,
            made: Arc::clone(&count),
        }
    });
    let cluster = start(&model, config(SHAPE, ComputeType::F32), Some(unruly));
    let answers = join_all(requests.iter().map(|r| ask(&cluster, r.clone()))).await;
    assert_eq!(answers, expected);
    assert!(
        made.load(Ordering::Relaxed) > 3,
        "it panicked and was started anew"
    );
    assert!(cluster.client().status().await.unwrap().totals.refusals > 0);
}

/// Dies of everything it hears.
struct Hopeless;

impl Scheduler for Hopeless {
    fn handle(&mut self, _: &SchedulerEvent, _: Now, _: &mut Vec<StepPlan>) {
        panic!("a defect of a user's scheduler");
    }
}

/// Answers everything with more plans than there are micro-batches, workers and sequences.
struct Flood(PolicyScheduler<FirstCome>);

impl Scheduler for Flood {
    fn handle(&mut self, event: &SchedulerEvent, now: Now, plans: &mut Vec<StepPlan>) {
        if !matches!(event, SchedulerEvent::Refused(_)) {
            plans.extend((0..2000).map(|i| StepPlan {
                micro_batch: MicroBatch(7 + i as u8 % 200),
                work: vec![],
                preempt: vec![],
            }));
        }
        self.0.handle(event, now, plans);
    }
}

#[tokio::test]
async fn a_scheduler_that_never_works_is_given_up_for_the_shipped_one() {
    let model = model("tiny-mixtral");
    let requests: Vec<Request> = (0..6)
        .map(|i| request(i, 5 + i * 9, model.spec().vocab))
        .collect();
    let calm = start(&model, config(SHAPE, ComputeType::F32), None);
    let expected = join_all(requests.iter().map(|r| ask(&calm, r.clone()))).await;
    let flood = || Flood(PolicyScheduler::new(FirstCome::new(24, 2)));
    for bad in [scheduler(|| Hopeless), scheduler(flood)] {
        let cluster = start(&model, config(SHAPE, ComputeType::F32), Some(bad));
        let answers = join_all(requests.iter().map(|r| ask(&cluster, r.clone()))).await;
        assert_eq!(answers, expected);
    }
}
