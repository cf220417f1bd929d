// The keep rule of gp_jax/pruning/rule.py: which visual tokens stay. All pictures of a request share one count.

// The largest number of kept tokens for which the cap does not apply.
function capTrigger(ratio, count) {
  if (ratio === null || count === 0) return count;
  let trigger = Math.trunc(ratio * count);
  while (trigger < count && (trigger + 1) / count <= ratio) trigger += 1;
  while (trigger > 0 && trigger / count > ratio) trigger -= 1;
  return trigger;
}

// The `count` largest values; of equal ones the first.
function best(values, count) {
  const order = Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b);
  const found = new Array(values.length).fill(false);
  for (const place of order.slice(0, Math.max(0, count))) found[place] = true;
  return found;
}

function corners(names, maps) {
  if (maps.length !== 1) return [];
  const { rows, columns } = maps[0];
  const corner = { tl: 0, tr: columns - 1, bl: (rows - 1) * columns, br: rows * columns - 1 };
  return names.map(name => corner[name]);
}

// maps: a reply's `mask`, with `importance` per row and column. rule: the fields of Prune by their names.
// Returns: per map the flags row by row, flat.
export function keepRule(maps, rule) {
  const values = Float32Array.from(maps.flatMap(map => map.importance.flat()));
  const total = values.length, cap = rule.max_remain_ratio ?? null, fixed = rule.fixed_remain_ratio ?? null;
  const threshold = Math.fround(rule.reduce_threshold), floor = Math.min(rule.min_remain_num ?? 0, total);
  let keep = Array.from(values, value => value > threshold);
  const count = keep.filter(Boolean).length, capped = count > capTrigger(cap, total);
  if (fixed !== null) keep = best(values, Math.max(Math.min(1, total), Math.min(total, Math.trunc(fixed * total))));
  else if (capped) keep = best(values, Math.max(Math.min(Math.trunc(cap * total), total), floor));
  else if (count < floor) best(values, floor).forEach((stays, place) => { keep[place] ||= stays; });
  for (const place of corners(rule.anchor_positions ?? [], maps)) keep[place] = true;
  let first = 0;
  return maps.map(map => keep.slice(first, first += map.rows * map.columns));
}
