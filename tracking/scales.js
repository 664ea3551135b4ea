"use strict";
// Numbers as people read them, the scales of axes, and what is done with points (steps and values).

// ------------------------------------------------------------------------------------------------------------ numbers

function trimmed(text) {
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

// 12.35k, 3.280, 0.001200, 1.5e-5, 8, NaN
function number(value, digits = 4) {
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size >= 1e15 || (size > 0 && size < 1e-3)) {
    const [mantissa, exponent] = value.toExponential(digits - 2).split("e");
    return `${trimmed(mantissa)}e${Number(exponent)}`;
  }
  for (const [unit, suffix] of [
    [1e12, "T"],
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "k"],
  ])
    if (size >= unit && size >= 1e4) return plain(value / unit, digits) + suffix;
  return plain(value, size >= 1e3 ? Math.max(digits, 4) : digits);
}

// With all digits, so that a column of them can be compared; whole numbers without.
function plain(value, digits) {
  return Number.isInteger(value) ? trimmed(value.toPrecision(digits)) : value.toPrecision(digits);
}

const percent = (value) => (Number.isFinite(value) ? `${plain(100 * value, 3)}%` : number(value));
// As short as it can be, for an axis: 2.5, not 2.500.
const short = (text) => text.replace(/(\.\d*?)0+(?=\D*$)/, "$1").replace(/\.(?=\D*$)/, "");
const whole = (value) => Math.round(value).toLocaleString("en-US");

// -------------------------------------------------------------------------------------------------------------- scales

// Maps [from, to] to [start, end], by logarithms if `log`; with the way back and the places of its ticks.
function scale(from, to, start, end, log) {
  const map = log ? Math.log10 : (x) => x,
    back = log ? (x) => 10 ** x : (x) => x;
  const low = map(from),
    span = map(to) - low || 1;
  const at = (value) => start + ((map(value) - low) / span) * (end - start);
  at.back = (place) => back(low + ((place - start) / (end - start)) * span);
  at.ticks = (count, whole) => (log ? logTicks(from, to, count) : linearTicks(from, to, count, whole));
  at.holds = (value) => Number.isFinite(value) && (!log || value > 0);
  return at;
}

function linearTicks(from, to, count, whole) {
  const rough = (to - from) / Math.max(1, count),
    power = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  if (whole) step = Math.max(1, step);
  const found = [];
  for (let k = Math.ceil(from / step - 1e-9); k * step <= to + step * 1e-9; k++)
    found.push(Number((k * step).toPrecision(12)));
  return found;
}

function logTicks(from, to, count) {
  const low = Math.floor(Math.log10(from)),
    high = Math.ceil(Math.log10(to));
  if (to / from < 8) return linearTicks(from, to, count);
  const stride = Math.max(1, Math.ceil((high - low) / count));
  const factors = high - low <= count / 3 ? [1, 2, 5] : [1];
  const found = [];
  for (let power = low; power <= high; power += stride)
    for (const factor of factors) found.push(Number((factor * 10 ** power).toPrecision(12)));
  return found.filter((value) => value >= from * 0.999 && value <= to * 1.001);
}

// The first place in an ascending array whose value is at least `value`.
function place(array, value) {
  let low = 0,
    high = array.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (array[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}

// The values of points between two steps, and those where their line enters and leaves.
function within({ step, value }, from, to) {
  const begin = place(step, from),
    end = place(step, to + 1e-9),
    found = value.slice(begin, end);
  for (const [edge, i] of [
    [from, begin],
    [to, end],
  ])
    if (i > 0 && i < step.length)
      found.push(value[i - 1] + ((value[i] - value[i - 1]) * (edge - step[i - 1])) / (step[i] - step[i - 1] || 1));
  return found;
}

// Exponential moving mean with the weight of the missing past taken out; what is not finite is passed over.
function smoothed(steps, values, weight) {
  const found = { step: [], value: [] };
  let sum = 0,
    total = 0;
  values.forEach((value, i) => {
    if (!Number.isFinite(value)) return;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    found.step.push(steps[i]);
    found.value.push(sum / total);
  });
  return found;
}
