//! Faults strike and are mended.

use volley_transports::{Role, WorkerId};

use super::{FaultKind, Happening, Simulation};

impl Simulation {
    pub(super) fn strike(&mut self, index: usize) {
        let fault = self.faults[index];
        let now = self.now();
        self.note(fault.to_string());
        self.push(now + fault.lasts, Happening::Mend(index));
        match fault.kind {
            FaultKind::Kill { worker, told } => {
                let idle = self.mold.config.network.idle_timeout;
                if let Some(host) = self.hosts.get_mut(&worker) {
                    host.process = None;
                    host.away += 1;
                    // The next process does not know this link.
                    if let Some(link) = host.link.take() {
                        self.push(now + idle, Happening::Gone(worker, link.life));
                    }
                }
                if told {
                    self.end_process(worker);
                }
                // Nothing answers in its name until there is another one.
                self.network.silence(worker);
                self.unheard(worker);
            }
            FaultKind::Stop(worker) => {
                self.stop(worker);
                self.network.silence(worker);
                self.unheard(worker);
            }
            FaultKind::Hang(worker) => self.stop(worker),
            FaultKind::Slow(worker, times) => {
                if let Some(host) = self.hosts.get_mut(&worker) {
                    host.slowness = times;
                }
            }
            FaultKind::Cut(a, b) => self.network.cut(a, b),
            FaultKind::CutOff(worker) => {
                for peer in self.peers(worker) {
                    self.network.cut(worker, peer);
                }
            }
            FaultKind::Unseen(worker) => self.unheard(worker),
            FaultKind::Leave(worker) => {
                if let Some(host) = self.hosts.get_mut(&worker) {
                    host.away += 1;
                }
                self.leave(worker);
            }
            FaultKind::SchedulerDies => {
                self.controller.scheduler_dies(now);
                self.do_deeds();
            }
        }
    }

    pub(super) fn mend(&mut self, index: usize) {
        let fault = self.faults[index];
        self.note(format!("over: {fault}"));
        self.open -= 1;
        match fault.kind {
            FaultKind::Kill { worker, .. } => {
                self.network.unsilence(worker);
                self.heard_again(worker);
                self.back(worker);
            }
            FaultKind::Stop(worker) => {
                self.network.unsilence(worker);
                self.heard_again(worker);
                self.go_on(worker);
            }
            FaultKind::Hang(worker) => self.go_on(worker),
            FaultKind::Slow(worker, _) => {
                if let Some(host) = self.hosts.get_mut(&worker) {
                    host.slowness = 1;
                }
            }
            FaultKind::Cut(a, b) => self.network.heal(a, b),
            FaultKind::CutOff(worker) => {
                for peer in self.peers(worker) {
                    self.network.heal(worker, peer);
                }
            }
            FaultKind::Unseen(worker) => self.heard_again(worker),
            FaultKind::Leave(worker) => self.back(worker),
            FaultKind::SchedulerDies => {}
        }
    }

    fn peers(&self, worker: WorkerId) -> Vec<WorkerId> {
        let others = self
            .hosts
            .keys()
            .filter(|id| id.role == worker.role.opposite());
        others.copied().collect()
    }

    fn stop(&mut self, worker: WorkerId) {
        if let Some(host) = self.hosts.get_mut(&worker) {
            host.stopped += 1;
        }
    }

    /// A process that was stopped goes on where it was.
    fn go_on(&mut self, worker: WorkerId) {
        let now = self.now();
        let Some(host) = self.hosts.get_mut(&worker) else {
            return;
        };
        host.stopped -= 1;
        if host.stopped > 0 {
            return;
        }
        let Some(process) = &mut host.process else {
            return;
        };
        let number = process.number;
        let ended = *process.ended();
        if host.link.is_none() {
            self.push(now, Happening::Dial(worker, number));
        }
        if ended {
            self.push(now, Happening::Computed(worker, number));
        } else {
            self.wake(worker);
        }
    }

    /// A reason for which no process was started is gone.
    fn back(&mut self, worker: WorkerId) {
        if let Some(host) = self.hosts.get_mut(&worker) {
            host.away -= 1;
        }
        self.start_if_none(worker);
    }

    /// Starts a process where there is none and should be one.
    pub(super) fn start_if_none(&mut self, worker: WorkerId) {
        let host = &self.hosts[&worker];
        if host.away == 0 && host.process.is_none() {
            self.note(format!("{worker} is started again"));
            self.start(worker);
        }
    }
}

/// Workers of a role.
pub(super) fn workers(role: Role, count: u16) -> impl Iterator<Item = WorkerId> {
    (0..count).map(move |index| role.worker(index))
}
