// Tests the page that the link in a channel's confirmation mail opens.
import {expect, test} from './page.js'

const {WRENN_LINK: link} = process.env

test('a link confirms a channel, once, by a click and without an account', async ({page, context, baseURL}) => {
	expect(new URL(link).origin).toBe(baseURL)
	await page.goto('/confirm-channel')
	await page.getByRole('button').click()
	await expect(page.getByRole('alert')).toContainText('incomplete')

	const asked = []
	page.on('request', request => asked.push(request.method() + ' ' + new URL(request.url()).pathname))
	await page.goto('about:blank')
	const answer = await page.goto(link)
	expect(answer.headers()['referrer-policy']).toBe('no-referrer')
	expect(answer.headers()['content-security-policy']).toContain("frame-ancestors 'none'")
	await expect(page).toHaveTitle(/Get notifications/)
	await expect(page.locator('input')).toHaveCount(0)
	// Mail scanners open the link too, so opening it must not confirm anything.
	await page.waitForLoadState('networkidle')
	expect(asked.filter(request => !request.startsWith('GET '))).toEqual([])

	await page.getByRole('button', {name: 'Get notifications'}).click()
	await expect(page.getByRole('status')).toContainText("You will get the team's notifications")
	await expect(page.getByRole('button')).toBeHidden()
	expect(page.url()).not.toContain('token')
	expect(asked.filter(request => !request.startsWith('GET '))).toEqual(['POST /v1/channel-confirmations'])
	expect(await context.cookies()).toEqual([])

	await page.goto('about:blank')
	await page.goto(link)
	await page.getByRole('button').click()
	await expect(page.getByRole('alert')).toContainText('not valid')
})
